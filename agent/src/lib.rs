//! The Atoll node agent: pods to CRI calls.
