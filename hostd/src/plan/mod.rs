//! What to do, decided without doing it: `plan(desired, observed)` returns steps, in order. ◇

pub mod network;
