"""GPU kernels in Triton (the extra `lrc[triton]`), each beside a torch reference of the same signature (docs/kernels.md)."""
