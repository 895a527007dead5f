"""Pure functions of (seed, epoch, clip) that choose frames, crops, masks and augmentation."""
