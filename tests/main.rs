mod formats;
mod fuzz;

//! Everything that is tested from outside: one binary, one module per subject.
mod config;
mod privilege;
