"""A checkpoint of anomalib -> the files that retrain.py would have left."""
