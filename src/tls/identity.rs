//! Who we are: client certificates, and which of several to show.

use super::{Pem, TlsError, certificates};
use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    crypto::CryptoProvider,
    pki_types::{PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use std::{fmt, sync::Arc};
use x509_cert::der::{Decode, Encode};

struct Identity {
    /// Who issued each certificate of the chain, as the server would name it (DER).
    issuers: Vec<Vec<u8>>,
    key: Arc<CertifiedKey>,
}

/// Client certificates with their keys; at least one.
pub struct Identities(Vec<Identity>);

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} client certificates", self.0.len())
    }
}

impl Identities {
    pub fn new(pairs: &[(Pem, Pem)], provider: &CryptoProvider) -> Result<Identities, TlsError> {
        pairs.iter().map(|(chain, key)| identity(chain, key, provider)).collect::<Result<_, _>>().map(Identities)
    }
}

fn identity(chain: &Pem, key: &Pem, provider: &CryptoProvider) -> Result<Identity, TlsError> {
    let unusable = || TlsError::NoKey { name: key.name.clone() };
    let certificates = certificates(chain)?;
    let secret = PrivateKeyDer::from_pem_slice(&key.bytes).map_err(|_| unusable())?;
    let signer = provider.key_provider.load_private_key(secret).map_err(|_| unusable())?;
    let issuers = certificates
        .iter()
        .filter_map(|c| x509_cert::Certificate::from_der(c).ok()?.tbs_certificate().issuer().to_der().ok())
        .collect();
    let pair = CertifiedKey::new(certificates, signer);
    match pair.keys_match() {
        Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) => {
            Err(TlsError::Mismatch { certificate: chain.name.clone(), key: key.name.clone() })
        }
        _ => Ok(Identity { issuers, key: Arc::new(pair) }),
    }
}

impl ResolvesClientCert for Identities {
    /// One that an authority issued which the server names, else the first: servers that name none, or name them badly, are common.
    fn resolve(&self, wanted: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let usable = || self.0.iter().filter(|i| i.key.key.choose_scheme(schemes).is_some());
        let named = usable().find(|i| i.issuers.iter().any(|issuer| wanted.contains(&issuer.as_slice())));
        named.or_else(|| usable().next()).map(|i| i.key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
