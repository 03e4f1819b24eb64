"""Kernels for CUDA in Triton: products with packed weights, a layer of experts, and attention over a cache in blocks.

Each has its definition in PyTorch's operations in kernels/packed.py, quantized.py, paged_attention.py or
latent_attention.py, which its tests compare it with in Triton's interpreter, on the processor; they are also compiled
for several generations of GPUs there. What is imported from here loads triton: kernels/select.py says whether to.
"""
