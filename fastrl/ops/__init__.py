"""Operations: tensors in, tensors out, one file each; every path of an op is visible in its file."""
