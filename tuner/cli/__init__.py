"""The command line: one function for each verb.

Modules are imported inside each verb: `--help`, `check`, `status` and `export` must not wait
for TensorFlow, and no verb for what it does not use.
"""
