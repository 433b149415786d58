//! TLS: whom we believe at the other end of a connection, who we say we are, and what we say when we do not believe.
//!
//! * The authorities of the system, and beside or instead of them those that a host's configuration names.
//! * A certificate that a configuration names as authority is believed when a server shows that very certificate, too: self-signed
//!   certificates are made that way, and Go programs (containerd, docker) accept them so.
//! * A refusal says which certificate it was (subject, fingerprint), what is wrong with it, and leaves it to the caller, who knows the
//!   host and the configuration, to say what to do: [`refusal`] finds it in whatever error the HTTP library gives.
//!
//! Nothing here knows of registries, and nothing here reads a file but the system's authorities: certificates and keys come as
//! [`Pem`] with the name they are known under, for errors. No error holds anything of a key.
#![forbid(unsafe_code)]

mod identity;
mod refusal;
mod verify;

pub use refusal::{Failed, Refusal, Trouble, refusal};

use crate::telemetry::catalog::say;
use rustls::{
    ClientConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, pem::PemObject},
};
use std::sync::Arc;

/// PEM text and where it came from.
#[derive(Clone, PartialEq, Eq)]
pub struct Pem {
    /// A path, or what else it is known as.
    pub name: String,
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// Whether the system's authorities count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum System {
    #[default]
    Trusted,
    /// Only those that are named.
    Ignored,
}

/// Whether a server has to prove itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verification {
    #[default]
    Required,
    /// Somebody asked for that in so many words.
    Skipped,
}

/// What HTTP is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocols {
    Http1,
    Http2Or1,
}

/// Who is believed, and who we are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    pub system: System,
    pub authorities: Vec<Pem>,
    /// Certificate chain and private key; both may be in one file.
    pub identities: Vec<(Pem, Pem)>,
    pub verification: Verification,
}

/// Why there is no TLS configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    #[error("{name} has no certificate in PEM form (-----BEGIN CERTIFICATE-----)")]
    NoCertificate { name: String },
    #[error("{name} has a certificate that cannot be read: {what}")]
    BadCertificate { name: String, what: String },
    #[error("{name} has no private key in PEM form that can be used; keys with a passphrase cannot")]
    NoKey { name: String },
    #[error("the private key in {key} does not belong to the certificate in {certificate}")]
    Mismatch { certificate: String, key: String },
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

/// The authorities of this machine.
#[derive(Debug, Clone, Default)]
pub struct SystemRoots {
    certificates: Vec<CertificateDer<'static>>,
}

impl SystemRoots {
    /// Those of `SSL_CERT_FILE` or `SSL_CERT_DIR`, else where distributions keep them. That there are none is an error only of a
    /// connection that would need them.
    pub fn load() -> SystemRoots {
        let loaded = rustls_native_certs::load_native_certs();
        for error in &loaded.errors {
            say!(AuthoritiesUnreadable, %error, "cannot read some of the system's certificate authorities");
        }
        SystemRoots { certificates: loaded.certs }
    }

    pub fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The certificates of a PEM text, at least one.
fn certificates(pem: &Pem) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem.bytes).collect();
    let read = read.map_err(|e| TlsError::BadCertificate { name: pem.name.clone(), what: e.to_string() })?;
    if read.is_empty() {
        return Err(TlsError::NoCertificate { name: pem.name.clone() });
    }
    Ok(read)
}

/// What a client needs to talk TLS to a server that `trust` is about.
pub fn client(trust: &Trust, roots: &SystemRoots, protocols: Protocols) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier = verify::Verifier::new(trust, roots, &provider)?;
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| TlsError::Setup(e.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match trust.identities.is_empty() {
        true => builder.with_no_client_auth(),
        false => builder.with_client_cert_resolver(Arc::new(identity::Identities::new(&trust.identities, &provider)?)),
    };
    config.alpn_protocols = match protocols {
        Protocols::Http1 => vec![b"http/1.1".to_vec()],
        Protocols::Http2Or1 => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
    };
    Ok(config)
}
