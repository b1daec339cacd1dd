//! The role on a server whose disks are replicated.
