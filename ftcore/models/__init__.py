"""Foundation models: weights, adapters, sharding, log-probabilities, reference."""
