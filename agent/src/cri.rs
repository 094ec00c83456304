//! Thin CRI client: a unix socket, a deadline for every call.
