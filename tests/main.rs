//! The product's tests, as one program: one module per subject.
mod architecture;
mod cli;
mod config;
mod daemon;
mod e2e;
#[path = "support/fault_registry.rs"]
mod fault_registry;
mod formats;
mod fs;
mod fuzz;
mod grpc;
mod index;
mod journal;
mod lab;
mod layers;
mod licences;
mod privilege;
mod referrers;
mod registry;
mod registry_environment;
mod registry_login;
mod registry_real;
mod support;
