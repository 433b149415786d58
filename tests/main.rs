//! The product's tests, as one program.

mod lab;
mod licences;
mod support;
