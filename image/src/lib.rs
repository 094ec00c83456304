//! Builds every Atoll boot artefact.
