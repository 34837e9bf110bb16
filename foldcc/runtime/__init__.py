"""Running a program on torch.distributed."""
