"""The Open Inference Protocol: its bodies and its tensors."""
