"""model.onnx -> model.plan, by TensorRT: built, refitted or kept, and always proved."""
