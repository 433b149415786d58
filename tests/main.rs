//! The product's tests, as one program: one module per subject.
mod architecture;
mod cli;
mod config;
mod e2e;
mod formats;
mod fs;
mod fuzz;
mod grpc;
mod lab;
mod licences;
mod privilege;
mod support;
