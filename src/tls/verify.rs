//! Judging a server's certificate.

use super::{
    System, SystemRoots, TlsError, Trust, Verification, certificates,
    refusal::{Refusal, Shown, Trouble},
};
use rustls::{
    CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// The TLS library's own judgement, and around it what it does not do: certificates that are their own authority, and words.
#[derive(Debug)]
pub(super) struct Verifier {
    provider: Arc<CryptoProvider>,
    /// None: there is no authority to judge by.
    chains: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates that were named as authorities.
    named: Vec<CertificateDer<'static>>,
    verification: Verification,
}

impl Verifier {
    pub fn new(trust: &Trust, system: &SystemRoots, provider: &Arc<CryptoProvider>) -> Result<Verifier, TlsError> {
        let mut named = Vec::new();
        let mut store = RootCertStore::empty();
        for pem in &trust.authorities {
            for certificate in certificates(pem)? {
                store
                    .add(certificate.clone())
                    .map_err(|e| TlsError::BadCertificate { name: pem.name.clone(), what: e.to_string() })?;
                named.push(certificate);
            }
        }
        if trust.system == System::Trusted {
            store.add_parsable_certificates(system.certificates.iter().cloned());
        }
        let chains = match store.is_empty() {
            true => None,
            false => Some(
                WebPkiServerVerifier::builder_with_provider(store.into(), provider.clone())
                    .build()
                    .map_err(|e| TlsError::Setup(e.to_string()))?,
            ),
        };
        Ok(Verifier { provider: provider.clone(), chains, named, verification: trust.verification })
    }

    /// A certificate that is believed because it was named, not because of who signed it: only its time and its host are checked.
    fn judge_named(&self, der: &CertificateDer<'_>, host: &ServerName<'_>, now: UnixTime) -> Result<(), Error> {
        let shown = Shown::of(der);
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        match shown.validity {
            Some((_, end)) if now > end => return Err(CertificateError::Expired.into()),
            Some((begin, _)) if now < begin => return Err(CertificateError::NotValidYet.into()),
            _ => {}
        }
        verify_server_name(&ParsedCertificate::try_from(der)?, host)
    }

    fn judge(
        &self,
        der: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        stapled: &[u8],
        now: UnixTime,
    ) -> Result<(), Error> {
        if self.named.iter().any(|named| **named == **der) {
            return self.judge_named(der, host, now);
        }
        match &self.chains {
            Some(chains) => chains.verify_server_cert(der, chain, host, stapled, now).map(|_| ()),
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    fn words(&self, error: &CertificateError, der: &CertificateDer<'_>) -> Refusal {
        let shown = Shown::of(der);
        let time = |seconds: Option<i64>| {
            let stamp = seconds.and_then(|s| jiff::Timestamp::from_second(s).ok());
            stamp.map_or_else(|| "a date that cannot be read".into(), |stamp| stamp.to_string())
        };
        let trouble = match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                Trouble::Expired { end: time(shown.validity.map(|v| v.1)) }
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Trouble::NotYetValid { begin: time(shown.validity.map(|v| v.0)) }
            }
            CertificateError::NotValidForNameContext { presented, .. } => {
                let plain = |name: &String| name.chars().filter(|c| !c.is_control()).take(100).collect();
                Trouble::WrongHost { names: presented.iter().take(8).map(plain).collect() }
            }
            CertificateError::NotValidForName => Trouble::WrongHost { names: Vec::new() },
            _ if self.chains.is_none() => Trouble::NoAuthorities,
            // Not believed as it stands, and nobody else vouches for it. (An authority that is shown as a server's own
            // certificate is another case of the same: openssl makes such ones by default.)
            CertificateError::UnknownIssuer | CertificateError::Other(_) if shown.self_issued => Trouble::SelfSigned,
            CertificateError::UnknownIssuer => Trouble::UnknownIssuer { issuer: shown.issuer.clone() },
            other => Trouble::Other(other.to_string()),
        };
        Refusal::new(trouble, der, &shown)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        der: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        stapled: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.verification == Verification::Skipped {
            return Ok(ServerCertVerified::assertion());
        }
        match self.judge(der, chain, host, stapled, now) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(Error::InvalidCertificate(error)) => {
                Err(CertificateError::Other(OtherError(Arc::new(self.words(&error, der)))).into())
            }
            Err(other) => Err(other),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        der: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, der, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        der: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, der, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// As openssl prints it.
pub(super) fn fingerprint(der: &CertificateDer<'_>) -> String {
    Sha256::digest(der).iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
}
