//! What is wrong at the other end, in words, and where the HTTP library has hidden it.

use super::verify::fingerprint;
use rustls::pki_types::CertificateDer;
use std::{error::Error, fmt, io};
use x509_cert::{Certificate, der::Decode};

/// Why a server is not believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// When it ended, RFC 3339.
    Expired { end: String },
    /// When it begins, RFC 3339.
    NotYetValid { begin: String },
    /// The names it is for.
    WrongHost { names: Vec<String> },
    /// It vouches for itself, and nobody told us to believe it.
    SelfSigned,
    /// The authority that is not among ours.
    UnknownIssuer { issuer: String },
    /// This machine has no authorities at all.
    NoAuthorities,
    /// In the words of the TLS library.
    Other(String),
}

/// A certificate that was not believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub trouble: Trouble,
    /// `CN=…`, as the certificate has it; empty if it cannot be read.
    pub subject: String,
    /// SHA-256 of the certificate, as `openssl x509 -fingerprint -sha256` prints it.
    pub fingerprint: String,
}

impl Error for Refusal {}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.trouble {
            Trouble::Expired { end } => write!(f, "its certificate expired on {end}")?,
            Trouble::NotYetValid { begin } => {
                write!(f, "its certificate is not valid before {begin}; is this machine's clock right?")?;
            }
            Trouble::WrongHost { names } if names.is_empty() => {
                write!(f, "its certificate is for no host at all (it has no subjectAltName)")?;
            }
            Trouble::WrongHost { names } => {
                write!(f, "its certificate is for another host: {}", names.join(", "))?;
            }
            Trouble::SelfSigned => write!(f, "its certificate is self-signed")?,
            Trouble::UnknownIssuer { issuer } => {
                write!(f, "its certificate was issued by {issuer:?}, an authority that this machine does not trust")?;
            }
            Trouble::NoAuthorities => {
                write!(f, "this machine has no certificate authorities to judge its certificate by")?;
            }
            Trouble::Other(what) => write!(f, "its certificate cannot be accepted: {what}")?,
        }
        write!(f, " (certificate {:?}, SHA-256 {})", self.subject, self.fingerprint)
    }
}

/// What can be read in a certificate, bounded: it comes from a stranger.
pub(super) struct Shown {
    pub subject: String,
    pub issuer: String,
    pub self_issued: bool,
    /// Unix seconds.
    pub validity: Option<(i64, i64)>,
}

impl Shown {
    pub fn of(der: &CertificateDer<'_>) -> Shown {
        let short = |text: String| text.chars().filter(|c| !c.is_control()).take(200).collect::<String>();
        let Ok(certificate) = Certificate::from_der(der) else {
            return Shown { subject: String::new(), issuer: String::new(), self_issued: false, validity: None };
        };
        let tbs = certificate.tbs_certificate();
        let seconds = |t: &x509_cert::time::Time| i64::try_from(t.to_unix_duration().as_secs()).ok();
        let validity = seconds(&tbs.validity().not_before).zip(seconds(&tbs.validity().not_after));
        Shown {
            subject: short(tbs.subject().to_string()),
            issuer: short(tbs.issuer().to_string()),
            self_issued: tbs.subject() == tbs.issuer(),
            validity,
        }
    }
}

impl Refusal {
    pub(super) fn new(trouble: Trouble, der: &CertificateDer<'_>, shown: &Shown) -> Refusal {
        Refusal { trouble, subject: shown.subject.clone(), fingerprint: fingerprint(der) }
    }
}

/// How TLS failed, where an error has that among its causes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failed {
    /// We do not believe the server.
    Refused(Refusal),
    /// The server wants to know who we are.
    WantsCertificate,
    /// What answers there is not TLS.
    NotTls,
}

/// How TLS failed, if that is what `error` is about.
pub fn refusal(error: &(dyn Error + 'static)) -> Option<Failed> {
    let mut next = Some(error);
    while let Some(cause) = next {
        // An io::Error names as its source that of the error inside, not the error itself.
        let inner = cause.downcast_ref::<io::Error>().and_then(|e| e.get_ref());
        let tls = match inner {
            Some(inner) => inner.downcast_ref::<rustls::Error>(),
            None => cause.downcast_ref::<rustls::Error>(),
        };
        if let Some(tls) = tls {
            return of_library(tls);
        }
        next = match inner {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => cause.source(),
        };
    }
    None
}

fn of_library(error: &rustls::Error) -> Option<Failed> {
    use rustls::{AlertDescription as Alert, CertificateError, Error, InvalidMessage};
    match error {
        Error::InvalidCertificate(CertificateError::Other(other)) => {
            other.0.downcast_ref::<Refusal>().cloned().map(Failed::Refused)
        }
        Error::AlertReceived(Alert::CertificateRequired | Alert::BadCertificate | Alert::UnknownCA) => {
            Some(Failed::WantsCertificate)
        }
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => Some(Failed::NotTls),
        _ => None,
    }
}
