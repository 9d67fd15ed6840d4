"""What the TPU compiler says of a run before there is a TPU: `glmv compile`. Nothing here is executed on a device."""
