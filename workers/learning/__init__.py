"""Pictures -> a trained model and its threshold."""
