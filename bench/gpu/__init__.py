"""What bench.gpu_report measures on a GPU, each part in a process of its own."""
