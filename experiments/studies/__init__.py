"""Questions about staged sampling, each a sweep of the embedded model: `python -m experiments.studies NAME`."""
