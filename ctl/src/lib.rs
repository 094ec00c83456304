//! The Atoll command line client.
