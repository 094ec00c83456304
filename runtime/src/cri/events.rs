//! GetContainerEvents, translation only.

use super::container::container_status;
use super::sandbox::sandbox_status;
use super::{Stream, status};
use crate::error::Error;
use crate::service::{EventKind, ServiceEvent};
use atoll_cri::v1::{ContainerEventResponse, ContainerEventType};
use tokio::sync::broadcast::{Receiver, error::RecvError};

/// Events from now on, until the runtime stops. A listener that falls behind is cut off: it has to list and listen again.
pub(super) fn follow(events: Receiver<ServiceEvent>) -> Stream<ContainerEventResponse> {
    Box::pin(futures_util::stream::unfold(Some(events), |events| async move {
        let mut events = events?;
        match events.recv().await {
            Ok(event) => Some((Ok(wire_event(&event)), Some(events))),
            Err(RecvError::Closed) => None,
            Err(RecvError::Lagged(missed)) => {
                let error =
                    Error::State(format!("{missed} events were lost: list containers and listen again"));
                Some((Err(status(error)), None))
            }
        }
    }))
}

fn wire_event(event: &ServiceEvent) -> ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => ContainerEventType::ContainerDeletedEvent,
    };
    ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind.into(),
        created_at: event.at_ns,
        pod_sandbox_status: Some(sandbox_status(&event.sandbox)),
        containers_statuses: event.containers.iter().map(container_status).collect(),
    }
}
