//! The product's tests, as one program: one module per subject.
mod architecture;
#[path = "support/certificates.rs"]
mod certificates;
mod cli;
mod config;
mod crash;
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
mod keychain_cluster;
mod keychain_cri;
mod lab;
mod layers;
mod licences;
mod operator;
mod privilege;
mod pull;
mod referrers;
mod registry;
mod registry_environment;
mod registry_hosts;
mod registry_login;
mod registry_real;
mod registry_tls;
mod resume;
mod storm;
mod support;
mod takeover;
mod units;
