"""Artifacts in, measurements out: ONNX export, runners, parity, latency, report, gate."""
