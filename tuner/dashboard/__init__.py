"""The web server: Optuna's dashboard behind a guard, and the pages and API of `tuner`."""
