//! Reading blocks of a disk.
