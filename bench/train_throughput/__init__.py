"""``python -m bench.train_throughput``: one training step of SdP-Net in five forms, timed against each other.

original (as the project the model comes from has it), eager (the best plain PyTorch), the same under torch.compile,
fused (this library) and fused under torch.compile. All forms share the weights' start, the data and
``sdpnet.train.train_step``: bf16 autocast, cross-entropy, backward, clipping, AdamW and the average of the weights.
"""
