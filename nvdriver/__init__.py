"""Stop and restart the GPU channels of one CUDA process, through the stock NVIDIA driver. Start at `nvdriver.api`."""
