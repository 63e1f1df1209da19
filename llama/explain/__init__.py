"""Look inside the model, and prove that it computes what other implementations compute."""
