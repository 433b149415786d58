#[path = "support/fault_registry.rs"]
mod fault_registry;
mod index;
mod referrers;
mod registry;
mod registry_environment;
mod registry_login;
mod registry_real;
