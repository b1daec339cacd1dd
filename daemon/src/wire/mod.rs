//! What travels between agent and dispatcher.
