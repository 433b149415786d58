//! Lazily loaded layers: what readers get, whatever the sources, the disk and the other readers do.

mod background;
mod disk;
mod faults;
pub(crate) mod lab;
mod large;
mod quota;
mod reads;
mod store;
mod verdict;
