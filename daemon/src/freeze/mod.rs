//! Making a checkpoint a point in time.
