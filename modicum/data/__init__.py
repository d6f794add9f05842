"""Images in: sources, label splits, ordered batches. Light to import: what needs torch lies in the modules."""
