//! Who may do what: root may everything, others what polkit lets them.
//!
//! Who calls is asked from the bus, never taken from the call.

use std::collections::HashMap;
use std::time::Duration;

use blxrep_dbus::POLKIT_DETAILS;
use blxrep_dbus::problem::{Problem, ProblemKind};
use tokio::time::timeout;
use tracing::warn;
use zbus::Connection;
use zbus::fdo::{self, DBusProxy};
use zbus::message::{Flags, Header};
use zbus::names::BusName;
use zbus::proxy::CacheProperties;
use zbus_polkit::policykit1::{AuthorityProxy, AuthorizationResult, CheckAuthorizationFlags, Subject};

use super::control::About;

/// How long polkit may take: a person may have to look for a password.
const ANSWER_MAX: Duration = Duration::from_secs(300);

/// Who decides.
#[derive(Debug, Clone)]
pub(super) enum Access {
    /// The bus says who calls, and polkit what they may.
    Polkit,
    /// What a test wants, where there is no bus.
    #[cfg(test)]
    Told(std::sync::Arc<super::tests::Told>),
}

impl Access {
    /// The user that a call comes from.
    pub(super) async fn caller_uid(
        &self,
        connection: &Connection,
        call: &Header<'_>,
    ) -> Result<u32, Problem> {
        match self {
            Self::Polkit => sender_uid(connection, call).await,
            #[cfg(test)]
            Self::Told(told) => Ok(told.uid()),
        }
    }

    /// Whether that user may do what an action stands for.
    pub(super) async fn check(
        &self,
        connection: &Connection,
        call: &Header<'_>,
        uid: u32,
        action: &str,
        about: &About,
    ) -> Result<(), Problem> {
        match self {
            Self::Polkit if uid == 0 => Ok(()),
            Self::Polkit => {
                let answer = match timeout(ANSWER_MAX, ask_polkit(connection, call, action, about)).await {
                    Ok(answer) => answer,
                    Err(_) => Err(zbus::Error::Failure(format!("no answer in {} s", ANSWER_MAX.as_secs()))),
                };
                verdict(action, answer)
            }
            #[cfg(test)]
            Self::Told(told) => told.check(action, about),
        }
    }
}

async fn sender_uid(connection: &Connection, call: &Header<'_>) -> Result<u32, Problem> {
    // Without a bus nobody vouches for a sender.
    let sender = call.sender().filter(|_| connection.is_bus());
    let sender = sender.ok_or_else(|| denied("it is not known who calls"))?;
    let asked = async {
        let bus = DBusProxy::builder(connection).cache_properties(CacheProperties::No).build().await?;
        bus.get_connection_unix_user(BusName::Unique(sender.clone())).await
    };
    asked.await.map_err(|error| denied(format!("the bus does not say who calls: {error}")))
}

async fn ask_polkit(
    connection: &Connection,
    call: &Header<'_>,
    action: &str,
    about: &About,
) -> zbus::Result<AuthorizationResult> {
    let polkit = AuthorityProxy::builder(connection).cache_properties(CacheProperties::No).build().await?;
    let subject =
        Subject::new_for_message_header(call).map_err(|error| zbus::Error::Failure(error.to_string()))?;
    let interactive = call.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
    let flags = if interactive {
        CheckAuthorizationFlags::ALLOW_USER_INTERACTION
    } else {
        CheckAuthorizationFlags::empty()
    };
    polkit.check_authorization(&subject, action, &details(about), flags, "").await
}

/// What polkit puts in place of `$(agent)` and the like: always all of them.
fn details(about: &About) -> HashMap<&'static str, &str> {
    let values = [&about.agent, &about.disk, &about.checkpoint, &about.target];
    POLKIT_DETAILS.into_iter().zip(values.map(|text| super::job::known(text).unwrap_or("-"))).collect()
}

fn verdict(action: &str, answer: zbus::Result<AuthorizationResult>) -> Result<(), Problem> {
    match answer {
        Ok(answer) if answer.is_authorized => Ok(()),
        Ok(answer) if answer.is_challenge => Err(denied(format!(
            "the polkit action {action} needs authentication: call where a person can be asked, or as root"
        ))),
        Ok(_) => Err(denied(format!("the polkit action {action} is not granted to this user"))),
        Err(error) if is_absent(&error) => Err(denied(format!(
            "polkit is not there to grant the action {action}: without it only root may do this"
        ))),
        Err(error) => {
            warn!("polkit failed to decide on {action}, which is denied: {error}");
            Err(denied(format!("polkit failed to decide on the action {action}: the journal says why")))
        }
    }
}

/// Whether nobody owns polkit's name, and nothing can be started for it.
fn is_absent(error: &zbus::Error) -> bool {
    let zbus::Error::FDO(error) = error else { return false };
    matches!(**error, fdo::Error::ServiceUnknown(_) | fdo::Error::NameHasNoOwner(_))
}

fn denied(message: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::AccessDenied, message)
}
