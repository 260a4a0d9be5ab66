"""Training: Megatron engine, optimizer, checkpoints, log and the loop."""
