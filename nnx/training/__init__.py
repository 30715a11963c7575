"""What trains a model: optimizers, metrics, averaged parameters."""
