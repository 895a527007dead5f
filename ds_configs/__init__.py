"""DeepSpeed configurations, installed as data of the package `mvd_scale.ds_configs`."""
