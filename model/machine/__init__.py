"""What the machine computes with: precision of products, 16-bit products on CPUs, and memory of the process."""
