"""The method, in Optuna's own terms: studies, samplers, Hyperband, the stop rule."""
