"""ReTool for JAX: reinforcement learning that teaches a model when and how to run code."""
