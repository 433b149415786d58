//! Everything that is tested from outside: one binary, one module per subject.
mod architecture;
mod config;
mod cli;
mod formats;
mod fs;
mod fuzz;
mod privilege;
//! The product's tests, as one program.

mod lab;
mod licences;
mod support;
mod grpc;
