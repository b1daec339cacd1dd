//! TLS 1.2 and 1.3 between agent and dispatcher, by rustls.
//!
//! The dispatcher makes a self-signed certificate at its first start (`tls/cert.pem` and `tls/key.pem` in the
//! data directory; put real ones there instead, before agents are enrolled). An agent accepts exactly the
//! certificate whose SHA-256 fingerprint is in its key; names and dates are not asked. There is no connection
//! without TLS.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::Digest;
use subtle::ConstantTimeEq;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as RustlsError, ServerConfig,
    SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::key::{hex, write_private};

/// The SHA-256 fingerprint of a certificate (of its DER form, as `openssl x509 -fingerprint -sha256` prints it).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha2::Sha256::digest(certificate.as_ref()).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// A certificate that cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds no certificate or key.
    #[error("{path} holds no usable PEM: {reason}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The certificate cannot be made.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    /// rustls does not accept it.
    #[error("TLS: {0}")]
    Rustls(#[from] RustlsError),
}

/// The dispatcher's certificate and private key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
}

impl Identity {
    /// Loads `tls/cert.pem` and `tls/key.pem` below the data directory, made first if there is none.
    ///
    /// # Errors
    /// When the files cannot be read, made or understood.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, TlsError> {
        let (certificate, key) = (data_dir.join("tls/cert.pem"), data_dir.join("tls/key.pem"));
        if !certificate.exists() {
            create(&certificate, &key)?;
        }
        let pem_error = |path: &Path, reason: String| TlsError::Pem { path: path.to_owned(), reason };
        let chain = CertificateDer::pem_file_iter(&certificate)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|e| pem_error(&certificate, e.to_string()))?;
        let first =
            chain.first().ok_or_else(|| pem_error(&certificate, "no certificate in it".to_owned()))?;
        let fingerprint = Fingerprint::of(first);
        let key = PrivateKeyDer::from_pem_file(&key).map_err(|e| pem_error(&key, e.to_string()))?;
        Ok(Self { chain, key, fingerprint })
    }

    /// The fingerprint agents are given.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The server's side of TLS.
    ///
    /// # Errors
    /// When key and certificate do not fit each other.
    pub fn acceptor(self) -> Result<TlsAcceptor, TlsError> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(self.chain, self.key)?;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

fn create(certificate: &Path, key: &Path) -> Result<(), TlsError> {
    let made = rcgen::generate_simple_self_signed(vec!["blxrep-dispatcher".to_owned()])?;
    let dir = certificate.parent().unwrap_or(Path::new("."));
    let at = |path: &Path| {
        let path = path.to_owned();
        |source| TlsError::File { path, source }
    };
    fs::create_dir_all(dir).map_err(at(dir))?;
    // The key first: a certificate that is there has its key.
    write_private(key, made.signing_key.serialize_pem().as_bytes()).map_err(at(key))?;
    write_private(certificate, made.cert.pem().as_bytes()).map_err(at(certificate))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The agent's side of TLS: only the pinned certificate is accepted.
///
/// # Errors
/// When rustls has no protocol version to offer.
pub fn connector(pinned: Fingerprint) -> Result<TlsConnector, TlsError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned(pinned)))
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Whether a failed handshake means that the dispatcher is not the pinned one.
pub fn is_wrong_fingerprint(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<RustlsError>());
    matches!(inner, Some(RustlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure)))
}

#[derive(Debug)]
struct Pinned(Fingerprint);

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        if bool::from(Fingerprint::of(end_entity).0.ct_eq(&self.0.0)) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(RustlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn handshake(pinned: Fingerprint, identity: Identity) -> io::Result<()> {
        let (client, server) = tokio::io::duplex(1 << 16);
        let acceptor = identity.acceptor().unwrap();
        let name = ServerName::try_from("blxrep-dispatcher").unwrap();
        let connector = connector(pinned).unwrap();
        let (client, _server) = tokio::join!(connector.connect(name, client), acceptor.accept(server));
        client.map(|_| ())
    }

    #[tokio::test]
    async fn only_the_pinned_certificate_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(dir.path()).unwrap();
        let pinned = first.fingerprint();
        assert_eq!(Identity::load_or_create(dir.path()).unwrap().fingerprint(), pinned, "made only once");
        handshake(pinned, first).await.unwrap();
        let other = tempfile::tempdir().unwrap();
        let error = handshake(pinned, Identity::load_or_create(other.path()).unwrap()).await.unwrap_err();
        assert!(is_wrong_fingerprint(&error), "{error:?}");
    }
}
