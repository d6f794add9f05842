"""Stage two: a backbone, few labels and many unlabelled images -> a classifier."""
