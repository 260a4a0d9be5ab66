"""From the files of the field (h5ad, Tahoe-100M parquet, SCDL, stores) to a store of cell sets."""
