"""The first minutes on a GPU: `bash bench/gpu_check.sh`, one module a section, each of which may fail alone."""
