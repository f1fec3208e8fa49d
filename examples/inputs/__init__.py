"""Images and random views of them: data sets, augmentations, batches on the device."""
