//! The role that keeps the replicas.
